"""What a masked language model is: its family, its layers and attention, and whether it keeps its family's promises."""
