"""Images, bytes and order: position-addressed views of a set of photographs."""
