"""Mixture of Block Attention."""
