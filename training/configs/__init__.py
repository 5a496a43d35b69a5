"""One short file per config; each defines `CONFIG` and says what it was measured to give."""
