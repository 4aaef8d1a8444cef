"""Development tools: the environment, the real server, the real page. Nothing here runs inside ComfyUI."""
