"""What became of a run: tables, pictures, and other load generators' files."""
