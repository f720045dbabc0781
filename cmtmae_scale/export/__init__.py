"""Export of a run's weights to other libraries, each verified before it is published."""
