"""Articles with pictures: written or given, illustrated from a folder."""
