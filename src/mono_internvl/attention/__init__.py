"""How tokens attend: blocks on a CPU, images that see themselves, packed segments."""
