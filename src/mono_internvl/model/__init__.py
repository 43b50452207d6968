"""What Mono-InternVL is: configuration, images, prompts, the network and its checkpoints."""
