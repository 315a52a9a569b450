"""Who may do what: passwords, rate limits for wrong ones, rules. Facts in, decisions out."""
