"""The benchmark: what decoding costs, beside what it could cost at best, with the promise tested where it is hard."""
