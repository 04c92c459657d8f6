"""What is learnt: objectives, losses, noise, where it goes and how strong it is."""
