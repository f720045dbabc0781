"""Evaluation of weights: k-NN and linear probes on labelled images."""
