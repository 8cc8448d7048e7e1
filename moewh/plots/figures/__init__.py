"""The figures, one file each: a `PANEL`, and a public function with the file's name."""
