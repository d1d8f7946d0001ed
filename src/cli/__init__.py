"""What command lines share: composing, explaining mistakes, exit statuses, and comparing variants."""
