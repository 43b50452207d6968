"""From images and messages to tokens and pixels: what a model is given."""
