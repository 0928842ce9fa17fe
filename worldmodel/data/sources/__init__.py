"""Where demonstrations come from: one file per simulator or import format."""
