"""What makes up, in closed form, for the units that go."""
