"""The attentive gate on scikit-learn's digits: which signs of the paper hold there."""
