"""Use a trained model: find its files, classify images, write the answers; nothing here changes what a stage writes."""
