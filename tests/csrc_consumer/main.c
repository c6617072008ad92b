/* One decision of the gate by the library that this was linked with; exits with 1 where it differs. */
#include <atts/atts.h>
#include <stdio.h>

int main(void) {
  float ring[4] = {1.0f, 2.0f, 3.0f, 0.0f};
  const float score = 2.5f;
  const int64_t key = 0;
  const int64_t level = ATTS_LEVEL_ONE / 2;
  const int64_t u = ATTS_LEVEL_ONE;
  const uint8_t insert = 1;
  int64_t size = 3, head = 3, greater = -1, ties = -1, n = -1;
  uint8_t takeover = 0;
  double p = 0.0;
  static atts_gate_params params;
  int status;

  if (atts_version() != ATTS_VERSION) {
    printf("header %d, library %d\n", ATTS_VERSION, atts_version());
    return 1;
  }
  params.struct_size = sizeof(params);
  params.score = &score;
  params.key = &key;
  params.level = &level;
  params.u = &u;
  params.insert = &insert;
  params.ring = ring;
  params.size = &size;
  params.head = &head;
  params.greater = &greater;
  params.ties = &ties;
  params.n = &n;
  params.takeover = &takeover;
  params.p = &p;
  params.batch = 1;
  params.keys = 1;
  params.capacity = 4;
  status = atts_gate_cpu(&params);
  printf("%s: p = %.2f, takeover = %d, ring holds %d\n", atts_strerror(status), p, takeover, (int)size);
  return status != ATTS_OK || greater != 1 || n != 3 || !takeover || p != 0.5 || ring[3] != score || size != 4;
}
