"""What a run leaves on disk, and how: whole files, locks, rows with their origin."""
