"""What a config.json says, checked: the decoder, the tower, and which visual experts there are."""
