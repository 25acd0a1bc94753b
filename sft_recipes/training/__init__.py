"""The workshop: from prepared rows to weights."""
