"""The tiny models from scratch: pictures, clips, masked images, texts, and the judges that read them."""
