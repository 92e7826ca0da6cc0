"""How tool calls stand in the text of an answer: one module for each shape, and `learn`, which tells them apart."""
