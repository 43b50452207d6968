"""A page to talk to a model in a browser: `mono-internvl web`."""
