"""Reports, studies, benchmarks, plans, figures and the demo; no training run imports them."""
