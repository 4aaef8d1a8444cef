"""Images about images: grids, captions and the colours of heat maps. Knows no node and nothing of ComfyUI."""
