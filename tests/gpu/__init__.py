"Tests for a GPU, real or pretended; see conftest.py."
