"""What is done to the surviving weights so that the pruned model computes what the original computed."""
