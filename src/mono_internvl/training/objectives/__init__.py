"""What a stage minimises: one file per objective, all behind one protocol."""
