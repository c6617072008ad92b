// How the device ops cut their work: pure functions of sizes, so that a captured launch fits every batch of its shape.
#ifndef ATTS_PLAN_H_
#define ATTS_PLAN_H_

#include <cstdint>

#include "checks.h"

namespace atts {

// score_logits: a row is summed in parts of so many bytes whoever sums them, for its bits must not depend on it.
constexpr int64_t kPartBytes = 32768;
// Rows up to which blocks share one; above, the rows alone fill any device.
constexpr int64_t kSharedRows = 1024;
// Largest value, sum of exponentials.
struct Part {
  float peak, sum;
};

constexpr int64_t score_parts(int64_t vocab, int32_t dtype) {
  const int64_t elements = kPartBytes / element_bytes(dtype);
  return (vocab - 1) / elements + 1;
}

// Tickets come first and always take the same room, so that calls of other shapes leave them 0.
constexpr int64_t kScoreTicketBytes = kSharedRows * sizeof(uint32_t);

// Bytes of workspace, 0 where it is not used, -1 where 63 bits do not hold it.
inline int64_t score_workspace(int64_t rows, int64_t vocab, int32_t dtype) {
  const int64_t parts = score_parts(vocab, dtype);
  if (rows == 0 || rows > kSharedRows || parts == 1) return 0;
  const int64_t bytes = product(rows, parts, sizeof(Part));
  return bytes < 0 || bytes > INT64_MAX - kScoreTicketBytes ? -1 : kScoreTicketBytes + bytes;
}

// gate: a block takes the rows of one key. Where keys outnumber rows, block i looks after the key of row i, if no
// earlier row has it.
constexpr int64_t gate_owners(int64_t batch, int64_t keys) { return batch < keys ? batch : keys; }

constexpr int64_t kGateSegment = 1024;   // ring entries that are worth a block
constexpr int64_t kGateBlocks = 2048;    // blocks in all, as long as no owner gets less than one

constexpr int64_t gate_splits(int64_t batch, int64_t keys, int64_t capacity) {
  const int64_t useful = (capacity + kGateSegment - 1) / kGateSegment;
  const int64_t most = kGateBlocks / gate_owners(batch, keys);
  return most < 1 ? 1 : useful < most ? useful : most;
}

// A uint64_t of counts for each row, then a uint32_t of a ticket for each owner; all are 0 between calls.
constexpr int64_t gate_workspace(int64_t batch, int64_t keys, int64_t capacity) {
  if (batch == 0 || gate_splits(batch, keys, capacity) == 1) return 0;
  return 8 * batch + 4 * gate_owners(batch, keys);
}

}  // namespace atts

#endif  // ATTS_PLAN_H_
