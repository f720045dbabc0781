"""What weights are worth: k-NN and linear probes on labelled images."""
