"""`mono-internvl VERB`: parse, call one function, print."""
