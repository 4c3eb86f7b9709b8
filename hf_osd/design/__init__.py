"""Makes a draft for a target: texts, what the target says of them, distillation, and a choice by measured speed."""
