"""Learning: objectives, the flow network, the update step, the epoch loop and its command line."""
