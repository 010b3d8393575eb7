"""Networks: the LaCT diffusion transformer, the video codec and the text encoder."""
