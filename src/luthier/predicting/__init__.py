"""Answers to the rows of a data set: which are asked, how they are kept, and what they are worth."""
