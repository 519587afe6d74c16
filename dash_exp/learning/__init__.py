"""Learning: pure maths (advantages, filters, losses), packing, and the learner that uses them."""
