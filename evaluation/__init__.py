"""Data to measure answers on: the questions of easy-vqa and printed words, each split into training and evaluation."""
