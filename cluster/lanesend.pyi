"""What a lane sends; its face is C only (lanesend.pxd)."""
