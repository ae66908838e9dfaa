"""A small vision-language model of each family, trained from scratch on drawn charts: data, training, evaluation."""
