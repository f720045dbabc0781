"""Reports, studies, benchmarks, figures and the demo; no training run imports them."""
