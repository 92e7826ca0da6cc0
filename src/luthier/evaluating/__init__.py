"""What a trained model makes of texts, answers and questions that it did not learn, as numbers with intervals."""
