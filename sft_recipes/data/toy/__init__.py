"""The built-in toy dataset and the from-scratch model of the tiny recipe."""
