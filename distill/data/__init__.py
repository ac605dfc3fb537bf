"""What is trained on: own files, the teacher's samples, digits that move; encoded once and stored."""
