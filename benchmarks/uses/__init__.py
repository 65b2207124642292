"""What uses of a metric give and cost, beside packages made for one of them."""
