"""Models from elsewhere: language models, adapters, the released layout and back."""
