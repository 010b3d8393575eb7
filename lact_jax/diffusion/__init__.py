"""Flow matching without a model: noise levels, the interleaved sequence, solvers, sampling."""
