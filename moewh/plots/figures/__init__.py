"""The figures, one file each: a `PANEL`, and the public function that has the file's name."""
