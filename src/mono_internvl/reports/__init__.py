"""What people look at: pages, charts, galleries and boxes, from the files of a run."""
