"""Weights in fewer bits: is the rise in loss predicted, and are the chosen bits good ones?"""
