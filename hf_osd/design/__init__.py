"""Makes a draft for a target offline: gathers and records texts, distils, and chooses by measured speed."""
